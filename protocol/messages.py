"""Every message of the data plane (port 9443) as a frozen value. WIRE_FORMAT.md is the normative description.

A message is a header (msgpack array) and, for `Frame` only, a body: the extent table, then the payload.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, TypeAlias

from protocol.errors import InvalidValue, RefusedByPeer, ReplicationError
from protocol.vocabulary import (
    CHANGE_SET_FRAMES_MAX,
    DISK_SIZE_BYTES_MAX,
    EPOCH_MAX,
    FRAME_EXTENTS_MAX,
    FRAME_RAW_BYTES_MAX,
    SEQUENCE_MAX,
    ChangeSetEnd,
    Compression,
    DiskId,
    check_identifier,
    check_range,
)

WIRE_VERSION: Final = 1
"""1: the first version; frames of packed extents, cumulative acknowledgements, cumulative credit."""
WIRE_VERSION_MAX: Final = 65535

CREDIT_BYTES_MAX: Final = 2**62
TEXT_LENGTH_MAX: Final = 1024
"""Bytes of UTF-8 in any text field."""

IDLE_SECONDS_MIN: Final = 3
IDLE_SECONDS_MAX: Final = 3600
"""What a welcome may ask for: shorter and a tick every third of it is noise, longer and a dead peer is noticed too
late."""


def check_text(value: str, what: str) -> str:
    """Returns `value`. Raises InvalidValue unless it is text of at most TEXT_LENGTH_MAX bytes of UTF-8."""
    if not isinstance(value, str) or "\0" in value:
        raise InvalidValue(what=what, value=value, rule="must be text without NUL")
    try:
        length = len(value.encode())
    except UnicodeEncodeError as error:
        raise InvalidValue(what=what, value=value, rule="must be valid Unicode") from error
    if length > TEXT_LENGTH_MAX:
        raise InvalidValue(what=what, value=value[:40] + "…", rule=f"must be at most {TEXT_LENGTH_MAX} bytes of UTF-8")
    return value


def shortened(value: str) -> str:
    """`value` made fit for a text field: cut to TEXT_LENGTH_MAX bytes, what is not valid Unicode replaced."""
    encoded = value.replace("\0", "").encode(errors="replace")[:TEXT_LENGTH_MAX]
    return encoded.decode(errors="ignore")


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """Agent → process server, first. The identity is the certificate's; nothing here is trusted for it."""

    wire_version_min: int
    wire_version_max: int
    agent_version: str
    boot_id: str

    def __post_init__(self) -> None:
        check_range(self.wire_version_max, "wire_version_max", low=1, high=WIRE_VERSION_MAX)
        check_range(self.wire_version_min, "wire_version_min", low=1, high=self.wire_version_max)
        check_text(self.agent_version, "agent_version")
        check_text(self.boot_id, "boot_id")


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome:
    """Process server → agent, the answer to Hello. Credit is granted by a Credit message that follows."""

    wire_version: int
    process_server: str
    idle_seconds_max: int
    """Either side closes a connection on which nothing arrived for so long; a Tick goes out at least every third of
    it."""

    def __post_init__(self) -> None:
        check_range(self.wire_version, "wire_version", low=1, high=WIRE_VERSION_MAX)
        check_text(self.process_server, "process_server")
        check_range(self.idle_seconds_max, "idle_seconds_max", low=IDLE_SECONDS_MIN, high=IDLE_SECONDS_MAX)


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenDisk:
    """Agent → process server: I want to send change sets of this disk.

    epoch: the newest epoch the agent knows, 0 if none. acknowledged_sequence: the highest durable sequence the agent
    was ever told in that epoch. wants_new_epoch: the history is to be continued in a new epoch (cache loss,
    resynchronization).
    """

    channel: int
    """Chosen by the agent, unique in the connection, names the disk in frames; 0..65535."""
    disk: DiskId
    epoch: int
    acknowledged_sequence: int
    wants_new_epoch: bool = False

    def __post_init__(self) -> None:
        check_range(self.channel, "channel", low=0, high=65535)
        check_identifier(self.disk, "disk")
        check_range(self.epoch, "epoch", low=0, high=EPOCH_MAX)
        check_range(self.acknowledged_sequence, "acknowledged_sequence", low=0, high=SEQUENCE_MAX)


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskOpened:
    """Process server → agent: where this disk's history stands. The agent's next change set is (epoch,
    durable_sequence + 1).

    parent_epoch/parent_sequence: the position that the epoch continues, (0, 0) for a disk's first epoch. What the
    agent sent after it in the parent epoch is not part of the history: those extents are copied in again. With
    SEQUENCE_UNKNOWN that is so of all that it ever sent.
    copy_in_cursor_bytes: the newest durable cursor of the epoch, None if none was ever stated.
    """

    channel: int
    epoch: int
    parent_epoch: int
    parent_sequence: int
    durable_sequence: int
    committed_sequence: int
    copy_in_cursor_bytes: int | None

    def __post_init__(self) -> None:
        check_range(self.channel, "channel", low=0, high=65535)
        check_range(self.epoch, "epoch", low=1, high=EPOCH_MAX)
        check_range(self.parent_epoch, "parent_epoch", low=0, high=self.epoch - 1)
        check_range(self.parent_sequence, "parent_sequence", low=0, high=SEQUENCE_MAX)
        check_range(self.durable_sequence, "durable_sequence", low=0, high=SEQUENCE_MAX)
        check_range(self.committed_sequence, "committed_sequence", low=0, high=self.durable_sequence)
        if self.copy_in_cursor_bytes is not None:
            check_range(self.copy_in_cursor_bytes, "copy_in_cursor_bytes", low=0, high=DISK_SIZE_BYTES_MAX)


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """Agent → process server: one part of a change set, independently decodable.

    The body that travels behind the header is `extent_count` rows of EXTENT_DTYPE, then `payload_bytes` bytes: the
    data extents' contents in table order, packed as `compression` says. `end` is present in the last frame of its
    change set. A frame may be empty (a change set that only moves a mark).
    """

    channel: int
    epoch: int
    sequence: int
    frame_number: int
    """0, 1, 2… within the change set."""
    extent_count: int
    raw_bytes: int
    payload_bytes: int
    compression: Compression
    end: ChangeSetEnd | None

    def __post_init__(self) -> None:
        check_range(self.channel, "channel", low=0, high=65535)
        check_range(self.epoch, "epoch", low=1, high=EPOCH_MAX)
        check_range(self.sequence, "sequence", low=1, high=SEQUENCE_MAX)
        check_range(self.frame_number, "frame_number", low=0, high=CHANGE_SET_FRAMES_MAX - 1)
        check_range(self.extent_count, "extent_count", low=0, high=FRAME_EXTENTS_MAX)
        check_range(self.raw_bytes, "raw_bytes", low=0, high=FRAME_RAW_BYTES_MAX)
        check_range(self.payload_bytes, "payload_bytes", low=0, high=FRAME_RAW_BYTES_MAX)
        if self.compression is Compression.NONE and self.payload_bytes != self.raw_bytes:
            check_range(self.payload_bytes, "payload_bytes", low=self.raw_bytes, high=self.raw_bytes)

    @property
    def is_last(self) -> bool:
        return self.end is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Positions:
    """Process server → agent: cumulative. Change sets ≤ durable survive power loss, ≤ committed can be read in
    storage."""

    channel: int
    epoch: int
    durable_sequence: int
    committed_sequence: int

    def __post_init__(self) -> None:
        check_range(self.channel, "channel", low=0, high=65535)
        check_range(self.epoch, "epoch", low=1, high=EPOCH_MAX)
        check_range(self.durable_sequence, "durable_sequence", low=0, high=SEQUENCE_MAX)
        check_range(self.committed_sequence, "committed_sequence", low=0, high=self.durable_sequence)


@dataclass(frozen=True, slots=True, kw_only=True)
class Credit:
    """Process server → agent: the total of body bytes that may have been sent on this connection since its start.
    Never falls."""

    total_bytes: int

    def __post_init__(self) -> None:
        check_range(self.total_bytes, "total_bytes", low=0, high=CREDIT_BYTES_MAX)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """Either way, keeps the connection alive. From the process server: the configuration server's clock as it knows it.

    instant_ns is None while the process server has never heard that clock, and always from an agent.
    """

    instant_ns: int | None

    def __post_init__(self) -> None:
        if self.instant_ns is not None:
            check_range(self.instant_ns, "instant_ns", low=0, high=2**63 - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class CloseDisk:
    """Either way: no more frames of this channel. From the process server with the reason's error code."""

    channel: int
    code: str
    detail: str
    is_retryable: bool

    def __post_init__(self) -> None:
        check_range(self.channel, "channel", low=0, high=65535)
        check_text(self.code, "code")
        check_text(self.detail, "detail")

    @staticmethod
    def from_error(channel: int, error: ReplicationError) -> CloseDisk:
        """The reason as the peer may know it; a long sentence is cut."""
        return CloseDisk(
            channel=channel, code=error.code, detail=shortened(str(error)), is_retryable=error.is_retryable
        )

    def to_error(self) -> RefusedByPeer:
        return RefusedByPeer(peer_code=self.code, detail=self.detail, retryable=self.is_retryable)


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Either way, the last message before the connection is closed because of an error."""

    code: str
    detail: str
    is_retryable: bool

    def __post_init__(self) -> None:
        check_text(self.code, "code")
        check_text(self.detail, "detail")

    @staticmethod
    def from_error(error: ReplicationError) -> Refusal:
        """The reason as the peer may know it; a long sentence is cut."""
        return Refusal(code=error.code, detail=shortened(str(error)), is_retryable=error.is_retryable)

    def to_error(self) -> RefusedByPeer:
        return RefusedByPeer(peer_code=self.code, detail=self.detail, retryable=self.is_retryable)


@dataclass(frozen=True, slots=True, kw_only=True)
class Goodbye:
    """Either way, the last message of an orderly end (service stop, drain)."""

    reason: str

    def __post_init__(self) -> None:
        check_text(self.reason, "reason")


Message: TypeAlias = (
    Hello | Welcome | OpenDisk | DiskOpened | Frame | Positions | Credit | Tick | CloseDisk | Refusal | Goodbye
)
