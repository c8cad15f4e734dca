"""The conversation of one connection as a state machine without I/O, the same machine seen from both of its ends.

`check_send()` is called with every message right before it is written, `receive()` with every message right after it
was read; both hold it against the same tables and the same rules. What breaks them is the peer's fault when received
(PeerFault) and our own defect when sent (SendNotAllowed), and changes nothing in the session.

Invariants: nothing precedes hello and welcome; a side's goodbye or refusal is its last message; a disk has one open
channel; sequences and frame numbers are contiguous from the durable position that opened the channel; body bytes
never exceed the credit; positions never fall and never pass what was sent.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final, TypeAlias

from protocol.errors import (
    CreditExceeded,
    EventNotAllowed,
    FrameGap,
    ImpossiblePositions,
    LimitExceeded,
    PeerFault,
    SendNotAllowed,
    SequenceGap,
    StaleEpoch,
    VersionNotSupported,
)
from protocol.framing import body_bytes_of
from protocol.messages import (
    WIRE_VERSION,
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
from protocol.vocabulary import CHANGE_SET_RAW_BYTES_MAX, DiskId

OPEN_CHANNELS_MAX: Final = 1024
"""Disks of one machine on one connection at a time."""


class Side(enum.Enum):
    AGENT = "agent"
    PROCESS_SERVER = "process server"


class ConnectionState(enum.Enum):
    """NEW → GREETED (hello) → OPEN (welcome) → one side ended → CLOSED (both ended, or one refused)."""

    NEW = "new"
    GREETED = "greeted"
    OPEN = "open"
    AGENT_ENDED = "agent ended"
    PROCESS_SERVER_ENDED = "process server ended"
    CLOSED = "closed"


class ChannelState(enum.Enum):
    """One channel number's life. A number is used once in a connection.

    WITHDRAWN: the agent closed it before it was opened. AGENT_CLOSED: the agent sends no more frames, positions still
    come. PROCESS_SERVER_CLOSED: the process server takes no more frames; those under way are dropped. CLOSED: both
    have closed it.
    """

    ABSENT = "absent"
    OPENING = "opening"
    OPEN = "open"
    WITHDRAWN = "withdrawn"
    AGENT_CLOSED = "agent closed"
    PROCESS_SERVER_CLOSED = "process server closed"
    CLOSED = "closed"


Event: TypeAlias = tuple[Side, type[Any]]
"""Who sends what."""


@dataclass(frozen=True, slots=True)
class Row:
    """What an event does in a state. crosses: it was sent before its sender heard of the end, and is dropped on
    arrival."""

    state: Any
    crosses: bool = False


_AGENT, _SERVER = Side.AGENT, Side.PROCESS_SERVER
_C = ConnectionState
_D = ChannelState

CONNECTION_TABLE: Final[Mapping[tuple[ConnectionState, Event], Row]] = {
    (_C.NEW, (_AGENT, Hello)): Row(_C.GREETED),
    (_C.NEW, (_AGENT, Refusal)): Row(_C.CLOSED),
    (_C.NEW, (_SERVER, Refusal)): Row(_C.CLOSED),
    (_C.GREETED, (_SERVER, Welcome)): Row(_C.OPEN),
    (_C.GREETED, (_AGENT, Refusal)): Row(_C.CLOSED),
    (_C.GREETED, (_SERVER, Refusal)): Row(_C.CLOSED),
    (_C.OPEN, (_AGENT, OpenDisk)): Row(_C.OPEN),
    (_C.OPEN, (_AGENT, Frame)): Row(_C.OPEN),
    (_C.OPEN, (_AGENT, CloseDisk)): Row(_C.OPEN),
    (_C.OPEN, (_AGENT, Tick)): Row(_C.OPEN),
    (_C.OPEN, (_AGENT, Goodbye)): Row(_C.AGENT_ENDED),
    (_C.OPEN, (_AGENT, Refusal)): Row(_C.CLOSED),
    (_C.OPEN, (_SERVER, DiskOpened)): Row(_C.OPEN),
    (_C.OPEN, (_SERVER, Positions)): Row(_C.OPEN),
    (_C.OPEN, (_SERVER, Credit)): Row(_C.OPEN),
    (_C.OPEN, (_SERVER, CloseDisk)): Row(_C.OPEN),
    (_C.OPEN, (_SERVER, Tick)): Row(_C.OPEN),
    (_C.OPEN, (_SERVER, Goodbye)): Row(_C.PROCESS_SERVER_ENDED),
    (_C.OPEN, (_SERVER, Refusal)): Row(_C.CLOSED),
    (_C.AGENT_ENDED, (_SERVER, DiskOpened)): Row(_C.AGENT_ENDED),
    (_C.AGENT_ENDED, (_SERVER, Positions)): Row(_C.AGENT_ENDED),
    (_C.AGENT_ENDED, (_SERVER, Credit)): Row(_C.AGENT_ENDED),
    (_C.AGENT_ENDED, (_SERVER, CloseDisk)): Row(_C.AGENT_ENDED),
    (_C.AGENT_ENDED, (_SERVER, Tick)): Row(_C.AGENT_ENDED),
    (_C.AGENT_ENDED, (_SERVER, Goodbye)): Row(_C.CLOSED),
    (_C.AGENT_ENDED, (_SERVER, Refusal)): Row(_C.CLOSED),
    (_C.PROCESS_SERVER_ENDED, (_AGENT, OpenDisk)): Row(_C.PROCESS_SERVER_ENDED, crosses=True),
    (_C.PROCESS_SERVER_ENDED, (_AGENT, Frame)): Row(_C.PROCESS_SERVER_ENDED, crosses=True),
    (_C.PROCESS_SERVER_ENDED, (_AGENT, CloseDisk)): Row(_C.PROCESS_SERVER_ENDED, crosses=True),
    (_C.PROCESS_SERVER_ENDED, (_AGENT, Tick)): Row(_C.PROCESS_SERVER_ENDED),
    (_C.PROCESS_SERVER_ENDED, (_AGENT, Goodbye)): Row(_C.CLOSED),
    (_C.PROCESS_SERVER_ENDED, (_AGENT, Refusal)): Row(_C.CLOSED),
}

CHANNEL_TABLE: Final[Mapping[tuple[ChannelState, Event], Row]] = {
    (_D.ABSENT, (_AGENT, OpenDisk)): Row(_D.OPENING),
    (_D.OPENING, (_SERVER, DiskOpened)): Row(_D.OPEN),
    (_D.OPENING, (_SERVER, CloseDisk)): Row(_D.PROCESS_SERVER_CLOSED),
    (_D.OPENING, (_AGENT, CloseDisk)): Row(_D.WITHDRAWN),
    (_D.OPEN, (_AGENT, Frame)): Row(_D.OPEN),
    (_D.OPEN, (_AGENT, CloseDisk)): Row(_D.AGENT_CLOSED),
    (_D.OPEN, (_SERVER, Positions)): Row(_D.OPEN),
    (_D.OPEN, (_SERVER, CloseDisk)): Row(_D.PROCESS_SERVER_CLOSED),
    (_D.WITHDRAWN, (_SERVER, DiskOpened)): Row(_D.AGENT_CLOSED, crosses=True),
    (_D.WITHDRAWN, (_SERVER, CloseDisk)): Row(_D.CLOSED),
    (_D.AGENT_CLOSED, (_SERVER, Positions)): Row(_D.AGENT_CLOSED),
    (_D.AGENT_CLOSED, (_SERVER, CloseDisk)): Row(_D.CLOSED),
    (_D.PROCESS_SERVER_CLOSED, (_AGENT, Frame)): Row(_D.PROCESS_SERVER_CLOSED, crosses=True),
    (_D.PROCESS_SERVER_CLOSED, (_AGENT, CloseDisk)): Row(_D.CLOSED),
}

_OCCUPYING: Final = frozenset({_D.OPENING, _D.OPEN})
"""The channel states in which a disk may not be opened on another channel."""

_ChannelMessage: TypeAlias = OpenDisk | DiskOpened | Frame | Positions | CloseDisk


@dataclass(slots=True, kw_only=True)
class _Channel:
    opening: OpenDisk
    state: ChannelState = ChannelState.ABSENT
    epoch: int = 0
    next_sequence: int = 0
    next_frame: int = 0
    change_set_raw_bytes: int = 0
    durable_sequence: int = 0
    committed_sequence: int = 0


class _Session:
    """One end. Its state is what its own side knows: what it sent and what it received, in that order."""

    side: ClassVar[Side]
    peer_side: ClassVar[Side]

    def __init__(self, *, wire_version_min: int = 1, wire_version_max: int = WIRE_VERSION) -> None:
        self._supported = (wire_version_min, wire_version_max)
        self._hello: Hello | None = None
        self._state = ConnectionState.NEW
        self._channels: dict[int, _Channel] = {}
        self._occupied: dict[DiskId, int] = {}
        self._wire_version: int | None = None
        self._body_bytes_sent = 0
        self._credit_bytes_granted = 0

    # what shells ask

    @property
    def state(self) -> ConnectionState:
        return self._state

    @property
    def wire_version(self) -> int | None:
        """The version to speak: at the process server known with the hello, at the agent with the welcome."""
        return self._wire_version

    @property
    def body_bytes_total(self) -> int:
        """Body bytes that went from the agent to the process server on this connection, dropped ones included."""
        return self._body_bytes_sent

    @property
    def credit_bytes_granted(self) -> int:
        """The newest credit's total."""
        return self._credit_bytes_granted

    @property
    def credit_bytes_available(self) -> int:
        """How many more body bytes may be sent now."""
        return self._credit_bytes_granted - self._body_bytes_sent

    def channel_state(self, channel: int) -> ChannelState:
        found = self._channels.get(channel)
        return ChannelState.ABSENT if found is None else found.state

    def disk_of(self, channel: int) -> DiskId:
        """The disk that `channel` was opened for. Raises KeyError for a channel that never was."""
        return self._channels[channel].opening.disk

    # what shells tell

    def receive(self, message: Message) -> Message | None:
        """Takes in a message of the peer. Returns it, or None if it crossed our end or close and must be dropped.

        Raises a PeerFault: tell it to the peer by a Refusal, close the connection, and act on nothing of the message.
        """
        return None if self._take(self.peer_side, message).crosses else message

    def check_send(self, message: Message) -> None:
        """Takes in a message of ours; write it right after, whole, or give the connection up. Raises SendNotAllowed."""
        try:
            self._take(self.side, message)
        except PeerFault as fault:
            raise SendNotAllowed(event=type(message).__name__, reason=str(fault)) from fault

    # the machine

    def _take(self, side: Side, message: Message) -> Row:
        event = (side, type(message))
        row = CONNECTION_TABLE.get((self._state, event))
        if row is None:
            raise EventNotAllowed(state=self._state.value, event=f"{type(message).__name__} of the {side.value}")
        if isinstance(message, Frame):
            self._check_credit(message)
        if not row.crosses and isinstance(message, _ChannelMessage):
            row = self._take_on_channel(event, message)
        elif not row.crosses:
            rule = _CONNECTION_RULES.get(type(message))
            if rule is not None:
                rule(self, message)
        if isinstance(message, Frame):
            self._body_bytes_sent += body_bytes_of(message)
        if not isinstance(message, _ChannelMessage):
            self._state = row.state
        return row

    def _take_on_channel(self, event: Event, message: _ChannelMessage) -> Row:
        channel = self._channels.get(message.channel)
        if channel is None:
            if not isinstance(message, OpenDisk):
                raise self._not_allowed(ChannelState.ABSENT, message)
            channel = _Channel(opening=message)
        row = CHANNEL_TABLE.get((channel.state, event))
        if row is None:
            raise self._not_allowed(channel.state, message)
        rule = _CHANNEL_RULES.get(type(message))
        if rule is not None and not (row.crosses and isinstance(message, Frame)):
            rule(self, channel, message)
        channel.state = row.state
        if row.state not in _OCCUPYING and self._occupied.get(channel.opening.disk) == message.channel:
            del self._occupied[channel.opening.disk]
        return row

    @staticmethod
    def _not_allowed(state: ChannelState, message: _ChannelMessage) -> EventNotAllowed:
        return EventNotAllowed(state=f"{state.value} of channel {message.channel}", event=type(message).__name__)

    # rules of the connection: raise, or change what they are about

    def _check_credit(self, frame: Frame) -> None:
        total = self._body_bytes_sent + body_bytes_of(frame)
        if total > self._credit_bytes_granted:
            raise CreditExceeded(total=total, granted=self._credit_bytes_granted)

    def _take_hello(self, hello: Hello) -> None:
        low = max(hello.wire_version_min, self._supported[0])
        high = min(hello.wire_version_max, self._supported[1])
        if low > high:
            raise VersionNotSupported(
                what="the agent's wire protocol",
                version=_version_range(hello.wire_version_min, hello.wire_version_max),
                supported=_version_range(*self._supported),
            )
        self._hello = hello
        if self.side is Side.PROCESS_SERVER:
            self._wire_version = high

    def _take_welcome(self, welcome: Welcome) -> None:
        hello = self._hello
        assert hello is not None
        low = max(hello.wire_version_min, self._supported[0])
        high = min(hello.wire_version_max, self._supported[1])
        if not low <= welcome.wire_version <= high:
            raise VersionNotSupported(
                what="the welcome's wire protocol", version=welcome.wire_version, supported=_version_range(low, high)
            )
        self._wire_version = welcome.wire_version

    def _take_credit(self, credit: Credit) -> None:
        if credit.total_bytes < self._credit_bytes_granted:
            raise CreditExceeded(total=credit.total_bytes, granted=self._credit_bytes_granted)
        self._credit_bytes_granted = credit.total_bytes

    # rules of a channel

    def _take_open_disk(self, channel: _Channel, message: OpenDisk) -> None:
        occupied = self._occupied.get(message.disk)
        if occupied is not None:
            raise EventNotAllowed(state=f"open on channel {occupied}", event=f"OpenDisk of disk {message.disk}")
        if len(self._occupied) >= OPEN_CHANNELS_MAX:
            raise LimitExceeded(what="open channels", value=len(self._occupied) + 1, limit=OPEN_CHANNELS_MAX)
        self._channels[message.channel] = channel
        self._occupied[message.disk] = message.channel

    def _take_disk_opened(self, channel: _Channel, message: DiskOpened) -> None:
        opening = channel.opening
        lowest = opening.epoch + 1 if opening.wants_new_epoch else max(opening.epoch, 1)
        if message.epoch < lowest:
            raise StaleEpoch(disk=opening.disk, epoch=message.epoch, current=lowest)
        channel.epoch = message.epoch
        channel.next_sequence = message.durable_sequence + 1
        channel.durable_sequence = message.durable_sequence
        channel.committed_sequence = message.committed_sequence

    def _take_frame(self, channel: _Channel, frame: Frame) -> None:
        disk = channel.opening.disk
        if frame.epoch != channel.epoch:
            raise StaleEpoch(disk=disk, epoch=frame.epoch, current=channel.epoch)
        if frame.sequence != channel.next_sequence:
            raise SequenceGap(disk=disk, expected=channel.next_sequence, received=frame.sequence)
        if frame.frame_number != channel.next_frame:
            raise FrameGap(disk=disk, sequence=frame.sequence, expected=channel.next_frame, received=frame.frame_number)
        raw_bytes = channel.change_set_raw_bytes + frame.raw_bytes
        if raw_bytes > CHANGE_SET_RAW_BYTES_MAX:
            raise LimitExceeded(what="change set", value=raw_bytes, limit=CHANGE_SET_RAW_BYTES_MAX)
        if frame.is_last:
            channel.next_sequence, channel.next_frame, channel.change_set_raw_bytes = frame.sequence + 1, 0, 0
        else:
            channel.next_frame, channel.change_set_raw_bytes = frame.frame_number + 1, raw_bytes

    def _take_positions(self, channel: _Channel, message: Positions) -> None:
        disk = channel.opening.disk
        if message.epoch != channel.epoch:
            raise StaleEpoch(disk=disk, epoch=message.epoch, current=channel.epoch)
        sent = channel.next_sequence - 1
        if message.durable_sequence > sent:
            reason = f"durable {message.durable_sequence}, but only {sent} was sent whole"
            raise ImpossiblePositions(disk=disk, reason=reason)
        if message.durable_sequence < channel.durable_sequence:
            reason = f"durable {message.durable_sequence} after {channel.durable_sequence}"
            raise ImpossiblePositions(disk=disk, reason=reason)
        if message.committed_sequence < channel.committed_sequence:
            reason = f"committed {message.committed_sequence} after {channel.committed_sequence}"
            raise ImpossiblePositions(disk=disk, reason=reason)
        channel.durable_sequence = message.durable_sequence
        channel.committed_sequence = message.committed_sequence


def _version_range(low: int, high: int) -> str:
    return str(low) if low == high else f"{low} to {high}"


_CONNECTION_RULES: Final[Mapping[type[Any], Callable[[_Session, Any], None]]] = {
    Hello: _Session._take_hello,
    Welcome: _Session._take_welcome,
    Credit: _Session._take_credit,
}
_CHANNEL_RULES: Final[Mapping[type[Any], Callable[[_Session, _Channel, Any], None]]] = {
    OpenDisk: _Session._take_open_disk,
    DiskOpened: _Session._take_disk_opened,
    Frame: _Session._take_frame,
    Positions: _Session._take_positions,
}


class AgentSession(_Session):
    """The mobility agent's end. Opens disks, sends frames within credit_bytes_available, receives positions and
    credit."""

    side = Side.AGENT
    peer_side = Side.PROCESS_SERVER


class ProcessServerSession(_Session):
    """The process server's end. Grant credit as body_bytes_total plus what there is room for."""

    side = Side.PROCESS_SERVER
    peer_side = Side.AGENT
