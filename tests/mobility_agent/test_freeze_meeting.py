"""Disks that meet for a freeze: nobody waits for one that left, and nobody gets a label that took no part."""

from __future__ import annotations

import asyncio

import pytest

from mobility_agent.consistency.meeting import FreezeMeeting, Gate, Stage
from mobility_agent.core.freeze_point import FreezeLabel
from protocol.vocabulary import Consistency, DiskId

ONE, OTHER = DiskId("1" * 32), DiskId("2" * 32)
GOOD = FreezeLabel(consistency=Consistency.FILE_SYSTEM, reason="")
LONG_SECONDS = 60.0


@pytest.fixture
def meeting() -> FreezeMeeting:
    return FreezeMeeting([ONE, OTHER], monotonic_seconds=lambda: 7.0)


async def test_it_goes_on_when_all_have_come_so_far(meeting: FreezeMeeting) -> None:
    meeting.reach(ONE, Stage.DRAINED)
    waiting = asyncio.ensure_future(meeting.all_reach(Stage.DRAINED, seconds_max=LONG_SECONDS))
    await asyncio.sleep(0)
    assert not waiting.done()
    meeting.reach(OTHER, Stage.READY)
    await waiting
    assert set(meeting.members) == {ONE, OTHER}


async def test_nobody_waits_for_one_that_left(meeting: FreezeMeeting) -> None:
    meeting.reach(ONE, Stage.DRAINED)
    meeting.leave(OTHER, "its connection was lost")
    await meeting.all_reach(Stage.DRAINED, seconds_max=LONG_SECONDS)
    assert meeting.left == {OTHER: "its connection was lost"}
    meeting.reach(OTHER, Stage.READ)
    assert set(meeting.members) == {ONE}


async def test_a_meeting_of_nobody_waits_for_nobody() -> None:
    await FreezeMeeting([], monotonic_seconds=lambda: 0.0).all_reach(Stage.JUDGED, seconds_max=LONG_SECONDS)


async def test_who_takes_too_long_is_dismissed(meeting: FreezeMeeting) -> None:
    meeting.reach(ONE, Stage.READY)
    await meeting.all_reach(Stage.READY, seconds_max=0.0)
    assert set(meeting.members) == {ONE}
    assert "0 s" in meeting.left[OTHER]
    assert await meeting.label(OTHER, unsettled_reason="") is None


async def test_who_has_not_read_in_time_still_takes_part(meeting: FreezeMeeting) -> None:
    meeting.reach(ONE, Stage.READ)
    meeting.reach(OTHER, Stage.BEGUN)
    await meeting.all_read(seconds_max=0.0)
    assert set(meeting.members) == {ONE, OTHER}
    assert meeting.members[OTHER].begun_seconds == 7.0


async def test_labels_come_when_it_is_concluded(meeting: FreezeMeeting) -> None:
    meeting.leave(OTHER, "gone")
    told = asyncio.ensure_future(meeting.label(ONE, unsettled_reason="disturbed"))
    await meeting.all_reach(Stage.JUDGED, seconds_max=LONG_SECONDS)
    assert meeting.members[ONE].unsettled_reason == "disturbed"
    meeting.conclude(lambda disk: GOOD)
    assert await told == GOOD
    meeting.leave(ONE, "its work has ended")
    assert meeting.left == {OTHER: "gone"}


@pytest.mark.parametrize("gate", list(Gate))
async def test_called_off_every_gate_opens_and_none_takes_part(meeting: FreezeMeeting, gate: Gate) -> None:
    waiting = asyncio.ensure_future(meeting.passed(ONE, gate))
    label = asyncio.ensure_future(meeting.label(OTHER, unsettled_reason=""))
    await asyncio.sleep(0)
    meeting.call_off()
    assert await waiting is False
    assert await label is None
