"""The replication table over the whole product of states and events, openings, and the rule of settledness."""

from __future__ import annotations

import itertools

import pytest

from mobility_agent.core.replication import (
    TABLE,
    Action,
    Event,
    Opening,
    Relation,
    Standing,
    State,
    decide,
    is_point_due,
    is_settled,
    judge_opening,
    resync_cause_of,
)
from mobility_agent.core.resync_cause import ResyncCause
from protocol.errors import EventNotAllowed, StaleEpoch
from protocol.messages import DiskOpened
from protocol.vocabulary import SEQUENCE_UNKNOWN, DiskId

DISK = DiskId("d" * 32)
SIZE = 2**30
WORKING = (State.INITIAL_REPLICATION, State.DELTA_REPLICATION, State.RESYNCHRONIZATION, State.FREEZE)
PRODUCT = list(itertools.product(State, Event))


@pytest.mark.parametrize(("state", "event"), PRODUCT)
def test_every_state_and_event_has_a_row_or_a_typed_error(state: State, event: Event) -> None:
    if (state, event) in TABLE:
        transition = decide(state, event)
        assert isinstance(transition.state, State)
        assert isinstance(transition.action, Action)
    else:
        with pytest.raises(EventNotAllowed) as caught:
            decide(state, event)
        assert caught.value.fields == {"state": state.value, "event": event.value}


@pytest.mark.parametrize("state", list(State))
def test_from_every_state_a_lost_connection_a_failed_disk_and_a_pause_are_understood(state: State) -> None:
    for event in (Event.CONNECTION_LOST, Event.DISK_FAILED):
        decide(state, event)
    if state is not State.PAUSED:
        assert decide(state, Event.PAUSE_ORDERED).state is State.PAUSED


@pytest.mark.parametrize("state", WORKING)
def test_whatever_runs_is_suspended_when_the_connection_ends(state: State) -> None:
    transition = decide(state, Event.CONNECTION_LOST)
    assert (transition.state, transition.action) == (State.DISCONNECTED, Action.SUSPEND)


def test_data_flows_only_after_an_opening() -> None:
    flowing = {
        transition.state: origin
        for (origin, _), transition in TABLE.items()
        if transition.action in (Action.COPY, Action.DELTA) and origin not in WORKING
    }
    assert set(flowing.values()) == {State.OPENING}


def test_every_state_can_be_left_for_delta_replication() -> None:
    reached = {State.DELTA_REPLICATION}
    while True:
        more = {state for (state, _), transition in TABLE.items() if transition.state in reached} - reached
        if not more:
            break
        reached |= more
    assert reached == set(State)


def opened(**changes: int | None) -> DiskOpened:
    fields: dict[str, int | None] = {
        "channel": 0,
        "epoch": 1,
        "parent_epoch": 0,
        "parent_sequence": 0,
        "durable_sequence": 0,
        "committed_sequence": 0,
        "copy_in_cursor_bytes": None,
    }
    return DiskOpened(**(fields | changes))  # type: ignore[arg-type]


def standing(epoch: int = 0, sent: int = 0, acknowledged: int = 0) -> Standing:
    return Standing(epoch=epoch, sent_sequence=sent, acknowledged_sequence=acknowledged)


@pytest.mark.parametrize(
    ("known", "answer", "event", "relation", "empty"),
    [
        (standing(), opened(), Event.OPENED_EMPTY, Relation.UNKNOWN, True),
        (
            standing(1, 5, 4),
            opened(durable_sequence=4, copy_in_cursor_bytes=4096),
            Event.OPENED_EMPTY,
            Relation.SAME_EPOCH,
            True,
        ),
        (
            standing(1, 5, 5),
            opened(durable_sequence=5, copy_in_cursor_bytes=SIZE),
            Event.OPENED_COMPLETE,
            Relation.SAME_EPOCH,
            False,
        ),
        (standing(1, 5, 5), opened(durable_sequence=4), Event.OPENED_BEHIND, Relation.SAME_EPOCH, False),
        (
            standing(1, 5, 5),
            opened(durable_sequence=9, copy_in_cursor_bytes=SIZE),
            Event.OPENED_COMPLETE,
            Relation.UNKNOWN,
            False,
        ),
        (
            standing(1, 5, 5),
            opened(epoch=2, parent_epoch=1, parent_sequence=4),
            Event.OPENED_DIFFERING,
            Relation.CONTINUED,
            False,
        ),
        (
            standing(1, 5, 5),
            opened(epoch=2, parent_epoch=1, parent_sequence=6),
            Event.OPENED_DIFFERING,
            Relation.UNKNOWN,
            False,
        ),
        (
            standing(1, 5, 5),
            opened(epoch=2, parent_epoch=1, parent_sequence=4, durable_sequence=1),
            Event.OPENED_DIFFERING,
            Relation.UNKNOWN,
            False,
        ),
        (
            standing(1, 5, 5),
            opened(epoch=2, parent_epoch=1, parent_sequence=SEQUENCE_UNKNOWN),
            Event.OPENED_DIFFERING,
            Relation.UNKNOWN,
            False,
        ),
        (
            standing(1, 5, 5),
            opened(epoch=3, parent_epoch=2, parent_sequence=1),
            Event.OPENED_DIFFERING,
            Relation.UNKNOWN,
            False,
        ),
        (
            standing(),
            opened(durable_sequence=7, copy_in_cursor_bytes=65536),
            Event.OPENED_EMPTY,
            Relation.UNKNOWN,
            True,
        ),
        (standing(), opened(durable_sequence=7), Event.OPENED_DIFFERING, Relation.UNKNOWN, False),
    ],
)
def test_an_opening_is_judged_by_what_both_sides_know(
    known: Standing, answer: DiskOpened, event: Event, relation: Relation, empty: bool
) -> None:
    opening = judge_opening(known, answer, disk=DISK, disk_size_bytes=SIZE)
    assert (opening.event, opening.relation, opening.is_base_empty) == (event, relation, empty)


@pytest.mark.parametrize("relation", Relation)
@pytest.mark.parametrize(
    "event", [Event.OPENED_EMPTY, Event.OPENED_DIFFERING, Event.OPENED_COMPLETE, Event.OPENED_BEHIND]
)
@pytest.mark.parametrize("is_wanted", [False, True])
def test_an_opening_that_begins_a_resync_tells_why(relation: Relation, event: Event, is_wanted: bool) -> None:
    opening = Opening(event=event, relation=relation, is_base_empty=False, cursor_bytes=0)
    causes = {
        (Relation.UNKNOWN, Event.OPENED_DIFFERING): ResyncCause.HISTORY_UNKNOWN,
        (Relation.UNKNOWN, Event.OPENED_COMPLETE): ResyncCause.HISTORY_UNKNOWN,
        (Relation.UNKNOWN, Event.OPENED_BEHIND): ResyncCause.HISTORY_UNKNOWN,
        (Relation.SAME_EPOCH, Event.OPENED_BEHIND): ResyncCause.CACHE_LOST,
        (Relation.CONTINUED, Event.OPENED_BEHIND): ResyncCause.CACHE_LOST,
        (Relation.CONTINUED, Event.OPENED_DIFFERING): None if is_wanted else ResyncCause.EPOCH_FOUND,
    }
    assert resync_cause_of(opening, is_wanted=is_wanted) == causes.get((relation, event))


def test_an_older_epoch_than_the_known_one_is_refused() -> None:
    with pytest.raises(StaleEpoch):
        judge_opening(standing(3, 1, 1), opened(epoch=2, parent_epoch=1), disk=DISK, disk_size_bytes=SIZE)


@pytest.mark.parametrize(("first", "still", "dirty"), list(itertools.product([0, 65536], [True, False], [True, False])))
def test_a_position_is_settled_only_if_all_was_compared_under_one_proof_and_nothing_is_dirty(
    first: int, still: bool, dirty: bool
) -> None:
    settled = is_settled(first_bytes=first, is_still=still, dirty_remains=dirty)
    assert settled == (first == 0 and still and not dirty)


def test_a_point_is_due_after_a_change_and_otherwise_once_per_interval() -> None:
    assert is_point_due(is_changed=True, seconds_since_point=0.0, point_interval_seconds=300)
    assert is_point_due(is_changed=False, seconds_since_point=None, point_interval_seconds=300)
    assert is_point_due(is_changed=False, seconds_since_point=300.0, point_interval_seconds=300)
    assert not is_point_due(is_changed=False, seconds_since_point=299.0, point_interval_seconds=300)
