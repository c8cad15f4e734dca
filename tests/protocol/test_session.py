"""The session's tables walked over their whole product, and every rule broken once from each end."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import (
    CreditExceeded,
    EventNotAllowed,
    FrameGap,
    ImpossiblePositions,
    LimitExceeded,
    LocalFault,
    PeerFault,
    SendNotAllowed,
    SequenceGap,
    StaleEpoch,
    VersionNotSupported,
)
from protocol.messages import (
    CloseDisk,
    Credit,
    DiskOpened,
    Frame,
    Goodbye,
    Hello,
    Message,
    OpenDisk,
    Positions,
    Refusal,
    Tick,
    Welcome,
)
from protocol.session import (
    CHANNEL_TABLE,
    CONNECTION_TABLE,
    OPEN_CHANNELS_MAX,
    AgentSession,
    ChannelState,
    ConnectionState,
    ProcessServerSession,
    Side,
)
from protocol.vocabulary import (
    CHANGE_SET_RAW_BYTES_MAX,
    FRAME_RAW_BYTES_MAX,
    ChangeSetEnd,
    Compression,
    Consistency,
    DiskId,
)

Session = AgentSession | ProcessServerSession
AGENT, SERVER = Side.AGENT, Side.PROCESS_SERVER
DISK = DiskId("11" * 16)
OTHER_DISK = DiskId("22" * 16)
MANY = 2**40

HELLO = Hello(wire_version_min=1, wire_version_max=1, agent_version="0", boot_id="b")
WELCOME = Welcome(wire_version=1, process_server="p", idle_seconds_max=60)
GOODBYE = Goodbye(reason="stopping")
REFUSAL = Refusal(code="code", detail="detail", is_retryable=False)


def opening(channel: int = 1, disk: DiskId = DISK, epoch: int = 0, *, wants_new_epoch: bool = False) -> OpenDisk:
    return OpenDisk(channel=channel, disk=disk, epoch=epoch, acknowledged_sequence=0, wants_new_epoch=wants_new_epoch)


def opened(channel: int = 1, epoch: int = 1, durable: int = 0, committed: int = 0) -> DiskOpened:
    return DiskOpened(
        channel=channel,
        epoch=epoch,
        parent_epoch=0,
        parent_sequence=0,
        durable_sequence=durable,
        committed_sequence=committed,
        copy_in_cursor_bytes=None,
    )


def frame(
    sequence: int = 1, number: int = 0, *, last: bool = True, channel: int = 1, epoch: int = 1, raw_bytes: int = 0
) -> Frame:
    return Frame(
        channel=channel,
        epoch=epoch,
        sequence=sequence,
        frame_number=number,
        extent_count=1 if raw_bytes else 0,
        raw_bytes=raw_bytes,
        payload_bytes=raw_bytes,
        compression=Compression.NONE,
        end=ChangeSetEnd(consistency=Consistency.CRASH) if last else None,
    )


def positions(durable: int, committed: int = 0, *, channel: int = 1, epoch: int = 1) -> Positions:
    return Positions(channel=channel, epoch=epoch, durable_sequence=durable, committed_sequence=committed)


def closing(channel: int = 1) -> CloseDisk:
    return CloseDisk(channel=channel, code="", detail="", is_retryable=True)


Step = tuple[Side, Message]
GREETED: list[Step] = [(AGENT, HELLO), (SERVER, WELCOME)]
CREDITED: list[Step] = [*GREETED, (SERVER, Credit(total_bytes=MANY))]
OPENED: list[Step] = [*CREDITED, (AGENT, opening()), (SERVER, opened())]


def take(session: Session, step: Step) -> Message | None:
    side, message = step
    if side is session.side:
        session.check_send(message)
        return message
    return session.receive(message)


ENDS: list[type[Session]] = [AgentSession, ProcessServerSession]


def play(end: type[Session], steps: list[Step]) -> Any:
    session = end()
    for step in steps:
        take(session, step)
    return session


def refused(session: Session, step: Step, fault: type[PeerFault]) -> None:
    """The step breaks a rule: the peer's fault when received, our own defect when sent. It changes nothing."""
    before = snapshot(session)
    expected = SendNotAllowed if step[0] is session.side else fault
    with pytest.raises(expected) as caught:
        take(session, step)
    if step[0] is session.side:
        assert isinstance(caught.value, LocalFault)
        assert isinstance(caught.value.__cause__, fault)
    assert snapshot(session) == before


def snapshot(session: Any) -> Any:
    return (
        session.state,
        session.body_bytes_total,
        session.credit_bytes_granted,
        session.wire_version,
        {number: repr(channel) for number, channel in session._channels.items()},
        dict(session._occupied),
    )


# the tables

MIXED: list[Step] = [*OPENED, (AGENT, opening(2, OTHER_DISK))]
CONNECTION_SCRIPTS: dict[ConnectionState, list[Step]] = {
    ConnectionState.NEW: [],
    ConnectionState.GREETED: [(AGENT, HELLO)],
    ConnectionState.OPEN: MIXED,
    ConnectionState.AGENT_ENDED: [*MIXED, (AGENT, GOODBYE)],
    ConnectionState.PROCESS_SERVER_ENDED: [*MIXED, (SERVER, GOODBYE)],
    ConnectionState.CLOSED: [*MIXED, (AGENT, GOODBYE), (SERVER, GOODBYE)],
}
EXAMPLES: dict[type[Any], Message] = {
    Hello: HELLO,
    Welcome: WELCOME,
    OpenDisk: opening(3, DiskId("33" * 16)),
    DiskOpened: opened(2),
    Frame: frame(),
    Positions: positions(0),
    Credit: Credit(total_bytes=MANY),
    Tick: Tick(instant_ns=None),
    CloseDisk: closing(),
    Refusal: REFUSAL,
    Goodbye: GOODBYE,
}
EVERY_EVENT = list(itertools.product(Side, EXAMPLES))


def test_the_examples_are_all_message_types() -> None:
    assert set(EXAMPLES) == set(Message.__args__)  # type: ignore[attr-defined]
    assert set(CONNECTION_SCRIPTS) == set(ConnectionState)


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize(("state", "event"), list(itertools.product(ConnectionState, EVERY_EVENT)))
def test_every_event_in_every_connection_state_does_what_the_table_says(
    end: type[Session], state: ConnectionState, event: tuple[Side, type[Any]]
) -> None:
    session = play(end, CONNECTION_SCRIPTS[state])
    assert session.state is state
    row = CONNECTION_TABLE.get((state, event))
    step = (event[0], EXAMPLES[event[1]])
    if row is None:
        refused(session, step, EventNotAllowed)
        return
    result = take(session, step)
    assert session.state is row.state
    is_dropped = row.crosses and event[0] is not session.side
    assert result is (None if is_dropped else step[1])


CHANNEL_SCRIPTS: dict[ChannelState, list[Step]] = {
    ChannelState.ABSENT: CREDITED,
    ChannelState.OPENING: [*CREDITED, (AGENT, opening())],
    ChannelState.OPEN: OPENED,
    ChannelState.WITHDRAWN: [*CREDITED, (AGENT, opening()), (AGENT, closing())],
    ChannelState.AGENT_CLOSED: [*OPENED, (AGENT, closing())],
    ChannelState.PROCESS_SERVER_CLOSED: [*OPENED, (SERVER, closing())],
    ChannelState.CLOSED: [*OPENED, (SERVER, closing()), (AGENT, closing())],
}
CHANNEL_EXAMPLES: dict[type[Any], Message] = {
    OpenDisk: opening(),
    DiskOpened: opened(),
    Frame: frame(),
    Positions: positions(0),
    CloseDisk: closing(),
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize(
    ("state", "event"), list(itertools.product(ChannelState, itertools.product(Side, CHANNEL_EXAMPLES)))
)
def test_every_event_in_every_channel_state_does_what_the_table_says(
    end: type[Session], state: ChannelState, event: tuple[Side, type[Any]]
) -> None:
    session = play(end, CHANNEL_SCRIPTS[state])
    assert session.channel_state(1) is state
    row = CHANNEL_TABLE.get((state, event))
    step = (event[0], CHANNEL_EXAMPLES[event[1]])
    if row is None:
        refused(session, step, EventNotAllowed)
        return
    result = take(session, step)
    assert session.channel_state(1) is row.state
    is_dropped = row.crosses and event[0] is not session.side
    assert result is (None if is_dropped else step[1])
    assert session.disk_of(1) == DISK


def test_no_row_leaves_a_closed_connection_or_a_closed_channel() -> None:
    assert not [key for key in CONNECTION_TABLE if key[0] is ConnectionState.CLOSED]
    assert not [key for key in CHANNEL_TABLE if key[0] is ChannelState.CLOSED]


def test_who_has_ended_says_nothing_more() -> None:
    ended = {AGENT: ConnectionState.AGENT_ENDED, SERVER: ConnectionState.PROCESS_SERVER_ENDED}
    for side, state in ended.items():
        assert not [key for key in CONNECTION_TABLE if key[0] is state and key[1][0] is side]


# versions


@pytest.mark.parametrize(
    ("theirs", "ours", "spoken"), [((1, 1), (1, 1), 1), ((1, 3), (1, 2), 2), ((2, 3), (1, 4), 3), ((1, 4), (2, 3), 3)]
)
def test_the_newest_version_that_both_know_is_spoken(
    theirs: tuple[int, int], ours: tuple[int, int], spoken: int
) -> None:
    agent = AgentSession(wire_version_min=theirs[0], wire_version_max=theirs[1])
    server = ProcessServerSession(wire_version_min=ours[0], wire_version_max=ours[1])
    hello = Hello(wire_version_min=theirs[0], wire_version_max=theirs[1], agent_version="", boot_id="")
    agent.check_send(hello)
    server.receive(hello)
    assert server.wire_version == spoken
    welcome = Welcome(wire_version=spoken, process_server="", idle_seconds_max=60)
    server.check_send(welcome)
    agent.receive(welcome)
    assert agent.wire_version == server.wire_version == spoken


@pytest.mark.parametrize("theirs", [(1, 1), (4, 9)])
def test_a_hello_without_a_common_version_is_refused_and_may_be_answered_by_a_refusal(theirs: tuple[int, int]) -> None:
    server = ProcessServerSession(wire_version_min=2, wire_version_max=3)
    hello = Hello(wire_version_min=theirs[0], wire_version_max=theirs[1], agent_version="", boot_id="")
    refused(server, (AGENT, hello), VersionNotSupported)
    server.check_send(REFUSAL)
    assert server.state is ConnectionState.CLOSED


@pytest.mark.parametrize("end", ENDS)
def test_a_welcome_in_a_version_that_was_not_offered_is_refused(end: type[Session]) -> None:
    session = play(end, [(AGENT, HELLO)])
    refused(session, (SERVER, Welcome(wire_version=2, process_server="", idle_seconds_max=60)), VersionNotSupported)


# channels


@pytest.mark.parametrize("end", ENDS)
def test_a_disk_that_is_open_is_not_opened_on_a_second_channel(end: type[Session]) -> None:
    refused(play(end, OPENED), (AGENT, opening(2)), EventNotAllowed)
    refused(play(end, [*CREDITED, (AGENT, opening())]), (AGENT, opening(2)), EventNotAllowed)


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("closer", Side)
def test_a_disk_that_either_side_closed_may_be_opened_on_a_new_channel(end: type[Session], closer: Side) -> None:
    session = play(
        end, [*OPENED, (AGENT, frame()), (closer, closing()), (AGENT, opening(2)), (SERVER, opened(2, durable=1))]
    )
    assert session.channel_state(2) is ChannelState.OPEN
    take(session, (AGENT, frame(2, channel=2)))
    refused(session, (AGENT, opening(1, OTHER_DISK)), EventNotAllowed)


@pytest.mark.parametrize("end", ENDS)
def test_channels_are_bounded_in_number(end: type[Session]) -> None:
    session = play(end, GREETED)
    for channel in range(OPEN_CHANNELS_MAX):
        take(session, (AGENT, opening(channel, DiskId(f"{channel:032x}"))))
    refused(session, (AGENT, opening(OPEN_CHANNELS_MAX)), LimitExceeded)
    take(session, (SERVER, closing(0)))
    take(session, (AGENT, opening(OPEN_CHANNELS_MAX)))


@pytest.mark.parametrize("end", ENDS)
def test_an_answer_in_an_older_epoch_or_not_in_a_new_one_as_asked_is_refused(end: type[Session]) -> None:
    session = play(
        end, [*GREETED, (AGENT, opening(1, DISK, 5)), (AGENT, opening(2, OTHER_DISK, 5, wants_new_epoch=True))]
    )
    refused(session, (SERVER, opened(1, 4)), StaleEpoch)
    refused(session, (SERVER, opened(2, 5)), StaleEpoch)
    take(session, (SERVER, opened(1, 5)))
    take(session, (SERVER, opened(2, 6)))


# sequences


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("durable", [0, 1, 41])
def test_the_first_change_set_follows_the_durable_position(end: type[Session], durable: int) -> None:
    steps: list[Step] = [*CREDITED, (AGENT, opening()), (SERVER, opened(durable=durable))]
    for wrong in {max(durable - 1, 0), durable, durable + 2} - {0}:
        refused(play(end, steps), (AGENT, frame(wrong)), SequenceGap)
    session = play(end, steps)
    take(session, (AGENT, frame(durable + 1)))
    refused(session, (AGENT, frame(durable + 1)), SequenceGap)
    take(session, (AGENT, frame(durable + 2)))


@pytest.mark.parametrize("end", ENDS)
def test_frames_are_numbered_without_gaps_and_only_the_last_ends_the_change_set(end: type[Session]) -> None:
    session = play(end, OPENED)
    refused(session, (AGENT, frame(1, 1)), FrameGap)
    take(session, (AGENT, frame(1, 0, last=False)))
    refused(session, (AGENT, frame(1, 0)), FrameGap)
    refused(session, (AGENT, frame(1, 2)), FrameGap)
    refused(session, (AGENT, frame(2, 0)), SequenceGap)
    take(session, (AGENT, frame(1, 1, last=False)))
    take(session, (AGENT, frame(1, 2)))
    refused(session, (AGENT, frame(1, 3)), SequenceGap)
    refused(session, (AGENT, frame(2, 3)), FrameGap)
    take(session, (AGENT, frame(2, 0)))


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("epoch", [1, 3])
def test_a_frame_or_positions_of_another_epoch_are_refused(end: type[Session], epoch: int) -> None:
    session = play(end, [*CREDITED, (AGENT, opening()), (SERVER, opened(epoch=2))])
    refused(session, (AGENT, frame(epoch=epoch)), StaleEpoch)
    refused(session, (SERVER, positions(0, epoch=epoch)), StaleEpoch)


@pytest.mark.parametrize("end", ENDS)
def test_a_change_set_holds_no_more_than_its_raw_limit(end: type[Session]) -> None:
    session = play(end, OPENED)
    frames = CHANGE_SET_RAW_BYTES_MAX // FRAME_RAW_BYTES_MAX
    for number in range(frames):
        take(session, (AGENT, frame(1, number, last=False, raw_bytes=FRAME_RAW_BYTES_MAX)))
    refused(session, (AGENT, frame(1, frames, raw_bytes=1)), LimitExceeded)
    take(session, (AGENT, frame(1, frames)))
    take(session, (AGENT, frame(2, 0, raw_bytes=FRAME_RAW_BYTES_MAX)))


@pytest.mark.parametrize("end", ENDS)
def test_two_disks_have_sequences_of_their_own(end: type[Session]) -> None:
    session = play(end, [*MIXED, (SERVER, opened(2, epoch=9, durable=70))])
    take(session, (AGENT, frame(1, 0, last=False)))
    take(session, (AGENT, frame(71, channel=2, epoch=9)))
    take(session, (AGENT, frame(1, 1)))
    take(session, (SERVER, positions(71, channel=2, epoch=9)))
    refused(session, (SERVER, positions(71)), ImpossiblePositions)


# positions


@pytest.mark.parametrize("end", ENDS)
def test_positions_never_name_a_change_set_that_was_not_sent_whole(end: type[Session]) -> None:
    session = play(end, OPENED)
    refused(session, (SERVER, positions(1)), ImpossiblePositions)
    take(session, (AGENT, frame(1, 0, last=False)))
    refused(session, (SERVER, positions(1)), ImpossiblePositions)
    take(session, (AGENT, frame(1, 1)))
    take(session, (SERVER, positions(1)))


@pytest.mark.parametrize("end", ENDS)
def test_positions_never_fall_and_may_repeat(end: type[Session]) -> None:
    session = play(end, [*OPENED, (AGENT, frame(1)), (AGENT, frame(2)), (SERVER, positions(2, 1))])
    take(session, (SERVER, positions(2, 1)))
    refused(session, (SERVER, positions(1, 1)), ImpossiblePositions)
    refused(session, (SERVER, positions(2, 0)), ImpossiblePositions)
    take(session, (SERVER, positions(2, 2)))


@pytest.mark.parametrize("end", ENDS)
def test_positions_still_come_after_the_agent_closed_the_disk_or_said_goodbye(end: type[Session]) -> None:
    closed = play(end, [*OPENED, (AGENT, frame()), (AGENT, closing())])
    assert take(closed, (SERVER, positions(1))) == positions(1)
    ended = play(end, [*OPENED, (AGENT, frame()), (AGENT, GOODBYE)])
    assert take(ended, (SERVER, positions(1, 1))) == positions(1, 1)


# credit


@pytest.mark.parametrize("end", ENDS)
def test_body_bytes_never_exceed_the_credit(end: type[Session]) -> None:
    bodies = 100 + 16
    session = play(end, [*GREETED, (AGENT, opening()), (SERVER, opened())])
    refused(session, (AGENT, frame(raw_bytes=100)), CreditExceeded)
    take(session, (AGENT, frame(1)))
    take(session, (SERVER, Credit(total_bytes=2 * bodies)))
    assert session.credit_bytes_available == 2 * bodies
    take(session, (AGENT, frame(2, raw_bytes=100)))
    assert session.credit_bytes_available == bodies
    refused(session, (AGENT, frame(3, raw_bytes=101)), CreditExceeded)
    take(session, (AGENT, frame(3, raw_bytes=100)))
    assert (session.credit_bytes_available, session.body_bytes_total) == (0, 2 * bodies)
    refused(session, (AGENT, frame(4, raw_bytes=1)), CreditExceeded)
    take(session, (AGENT, frame(4)))


@pytest.mark.parametrize("end", ENDS)
def test_a_credit_never_falls(end: type[Session]) -> None:
    session = play(end, CREDITED)
    take(session, (SERVER, Credit(total_bytes=MANY)))
    refused(session, (SERVER, Credit(total_bytes=MANY - 1)), CreditExceeded)


def test_frames_that_crossed_a_close_are_dropped_but_count_against_the_credit() -> None:
    server = play(ProcessServerSession, [*OPENED, (SERVER, closing())])
    assert server.receive(frame(7, 3, raw_bytes=100)) is None
    assert server.body_bytes_total == 116
    ended = play(ProcessServerSession, [*GREETED, (AGENT, opening()), (SERVER, opened()), (SERVER, GOODBYE)])
    refused(ended, (AGENT, frame(raw_bytes=100)), CreditExceeded)


# both ends together


@given(st.lists(st.sampled_from(EVERY_EVENT), max_size=40))
def test_two_ends_that_see_the_same_conversation_agree_on_every_step(events: list[tuple[Side, type[Any]]]) -> None:
    agent, server = play(AgentSession, CREDITED), play(ProcessServerSession, CREDITED)
    choices = {OpenDisk: opening(), DiskOpened: opened(), CloseDisk: closing()}
    for side, kind in events:
        message = choices.get(kind, EXAMPLES[kind])
        outcomes = []
        for session in (agent, server):
            try:
                take(session, (side, message))
            except (PeerFault, SendNotAllowed):
                outcomes.append(False)
            else:
                outcomes.append(True)
        assert outcomes[0] == outcomes[1]
        assert snapshot(agent) == snapshot(server)
