"""The disk's table over the whole product, and the choice of epochs over all small cases."""

from __future__ import annotations

import itertools

import pytest

from process_server.core.disk_lifecycle import DISK_TABLE, DiskEvent, DiskState, next_state
from process_server.core.epochs import AskedEpoch, EpochStep, KnownEpoch, choose_epoch
from protocol.errors import EventNotAllowed, NoGrant, StaleEpoch
from protocol.vocabulary import DiskId

DISK = DiskId("cc" * 16)


@pytest.mark.parametrize(("state", "event"), list(itertools.product(DiskState, DiskEvent)))
def test_every_pair_of_state_and_event_has_a_row_or_is_refused(state: DiskState, event: DiskEvent) -> None:
    if (state, event) in DISK_TABLE:
        assert next_state(state, event) is DISK_TABLE[state, event]
    else:
        with pytest.raises(EventNotAllowed):
            next_state(state, event)


def test_only_a_disk_at_rest_is_opened() -> None:
    assert [state for state in DiskState if (state, DiskEvent.OPENED) in DISK_TABLE] == [DiskState.RESTING]


def test_what_is_stopped_leaves_that_state_by_a_higher_grant_only() -> None:
    leaving = {
        event for (state, event), after in DISK_TABLE.items() if state is DiskState.STOPPED and after is not state
    }
    assert leaving == {DiskEvent.REGRANTED}


def test_faults_are_allowed_in_every_state() -> None:
    faults = (DiskEvent.BROKE_OFF, DiskEvent.CACHE_LOST, DiskEvent.SUPERSEDED)
    assert all((state, event) in DISK_TABLE for state in DiskState for event in faults)


GRANTED = [(), (1,), (2,), (1, 2), (2, 3), (1, 3)]
KNOWN = [None, *(KnownEpoch(epoch=epoch, is_used=is_used) for epoch in (1, 2, 3) for is_used in (False, True))]
ASKED = [AskedEpoch(epoch=epoch, wants_new=wants_new) for epoch in (0, 1, 2, 3, 4) for wants_new in (False, True)]


@pytest.mark.parametrize(("granted", "known", "asked"), list(itertools.product(GRANTED, KNOWN, ASKED)))
def test_a_chosen_epoch_is_granted_not_below_what_is_known_and_new_if_that_was_asked(
    granted: tuple[int, ...], known: KnownEpoch | None, asked: AskedEpoch
) -> None:
    try:
        choice = choose_epoch(DISK, granted=granted, known=known, asked=asked)
    except NoGrant:
        floor = asked.epoch + 1 if asked.wants_new else asked.epoch
        is_stuck = known is not None and not any(epoch > known.epoch for epoch in granted)
        assert is_stuck or not any(epoch >= floor for epoch in granted) or not granted
        return
    except StaleEpoch:
        assert asked.epoch > max(granted)
        return
    assert choice.epoch in granted
    if known is None:
        assert choice == choose_epoch(DISK, granted=granted[:1], known=None, asked=AskedEpoch(epoch=0, wants_new=False))
        return
    assert choice.epoch >= known.epoch
    assert choice.epoch >= asked.epoch + asked.wants_new
    if choice.step is EpochStep.CONTINUE:
        assert choice.epoch == known.epoch
        assert not (asked.wants_new and known.is_used)
    else:
        assert choice.step is EpochStep.BEGIN
        assert choice.epoch > known.epoch


def test_a_new_epoch_that_is_still_empty_is_not_left_for_another() -> None:
    choice = choose_epoch(
        DISK, granted=(1, 2, 3), known=KnownEpoch(epoch=2, is_used=False), asked=AskedEpoch(epoch=1, wants_new=True)
    )
    assert (choice.step, choice.epoch) == (EpochStep.CONTINUE, 2)


def test_an_agent_that_has_lost_everything_gets_a_new_epoch_and_not_the_old_one() -> None:
    choice = choose_epoch(
        DISK, granted=(1, 2), known=KnownEpoch(epoch=1, is_used=True), asked=AskedEpoch(epoch=0, wants_new=True)
    )
    assert (choice.step, choice.epoch) == (EpochStep.BEGIN, 2)


def test_grants_that_left_the_known_epoch_behind_begin_the_lowest_one() -> None:
    choice = choose_epoch(
        DISK, granted=(5, 6), known=KnownEpoch(epoch=3, is_used=True), asked=AskedEpoch(epoch=3, wants_new=False)
    )
    assert (choice.step, choice.epoch) == (EpochStep.BEGIN, 5)
