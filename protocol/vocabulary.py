"""The words of docs/glossary.md as types: identifiers, positions, extents, consistency, recovery point marks.

Values are frozen and validated when made; a value that exists is valid. All ranges are half-open, all sizes in bytes,
all instants in integer nanoseconds of the configuration server's clock since the Unix epoch.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from typing import Final, NewType

import numpy
import numpy.typing

from protocol.errors import InvalidValue

MachineId = NewType("MachineId", str)
DiskId = NewType("DiskId", str)
VaultId = NewType("VaultId", str)
ProcessServerId = NewType("ProcessServerId", str)
PointId = NewType("PointId", str)
"""All identifiers are 32 lower-case hexadecimal digits: the 16 bytes of a random UUID."""

EPOCH_FIRST: Final = 1
EPOCH_MAX: Final = 2**32 - 1
SEQUENCE_MAX: Final = 2**63 - 1
SEQUENCE_UNKNOWN: Final = SEQUENCE_MAX
"""As what an epoch continues: behind everything that anybody will ever have sent."""
DISK_SIZE_BYTES_MAX: Final = 2**56
EXTENT_LENGTH_BYTES_MAX: Final = 2**31
"""A longer run of zeroes is several extents. Data extents are bounded by FRAME_RAW_BYTES_MAX anyway."""

FRAME_RAW_BYTES_MAX: Final = 2**20
FRAME_EXTENTS_MAX: Final = 4096
CHANGE_SET_RAW_BYTES_MAX: Final = 64 * 2**20
CHANGE_SET_FRAMES_MAX: Final = 65536

DIGEST_BLOCK_BYTES: Final = 65536

_IDENTIFIER = re.compile(r"[0-9a-f]{32}")


def check_identifier(value: str, what: str) -> str:
    """Returns `value`. Raises InvalidValue unless it is 32 lower-case hexadecimal digits."""
    if not isinstance(value, str) or not _IDENTIFIER.fullmatch(value):
        raise InvalidValue(what=what, value=value, rule="must be 32 lower-case hexadecimal digits")
    return value


def check_range(value: int, what: str, *, low: int, high: int) -> int:
    """Returns `value`. Raises InvalidValue unless it is an int (not bool) with low <= value <= high."""
    if type(value) is not int or not low <= value <= high:
        raise InvalidValue(what=what, value=value, rule=f"must be an integer from {low} to {high}")
    return value


class Consistency(enum.Enum):
    """How good a position is as a copy of the source at one instant. Order matters: a later member promises more."""

    UNSETTLED = "unsettled"
    CRASH = "crash"
    FILE_SYSTEM = "file_system"
    APPLICATION = "application"

    @property
    def is_settled(self) -> bool:
        return self is not Consistency.UNSETTLED


class ChangeKind(enum.IntEnum):
    """What an extent carries. The numbers are those of both formats."""

    DATA = 0
    ZEROES = 1
    DISCARDED = 2


class Compression(enum.IntEnum):
    """How a frame's payload is packed before encryption. The numbers are those of both formats."""

    NONE = 0
    ZSTD = 1


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Position:
    """A place in one disk's history. Sequence 0 is the start of an epoch, before its first change set."""

    epoch: int
    sequence: int

    def __post_init__(self) -> None:
        check_range(self.epoch, "epoch", low=1, high=EPOCH_MAX)
        check_range(self.sequence, "sequence", low=0, high=SEQUENCE_MAX)

    def __str__(self) -> str:
        return f"{self.epoch}:{self.sequence}"


EXTENT_DTYPE: Final = numpy.dtype([("offset", "<u8"), ("length", "<u4"), ("kind", "u1"), ("reserved", "u1", (3,))])
"""One row of an extent table, 16 bytes on the wire, in the cache and in storage alike. reserved is zero."""

ExtentTable = numpy.typing.NDArray[numpy.void]
"""A one-dimensional array of EXTENT_DTYPE. Rows are in the order of application; in one frame they never overlap."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """The range [offset_bytes, offset_bytes + length_bytes) of a disk, for code that handles one extent at a time."""

    offset_bytes: int
    length_bytes: int
    kind: ChangeKind = ChangeKind.DATA

    def __post_init__(self) -> None:
        check_range(self.length_bytes, "length_bytes", low=1, high=EXTENT_LENGTH_BYTES_MAX)
        check_range(self.offset_bytes, "offset_bytes", low=0, high=DISK_SIZE_BYTES_MAX - self.length_bytes)

    @property
    def end_bytes(self) -> int:
        return self.offset_bytes + self.length_bytes


def extent_table(extents: list[Extent]) -> ExtentTable:
    """Packs extents into an EXTENT_DTYPE array, in the given order."""
    table = numpy.zeros(len(extents), dtype=EXTENT_DTYPE)
    table["offset"] = [extent.offset_bytes for extent in extents]
    table["length"] = [extent.length_bytes for extent in extents]
    table["kind"] = [extent.kind for extent in extents]
    return table


def extents_of(table: ExtentTable) -> list[Extent]:
    """The rows of a table as values. Raises InvalidValue for a row that is not a valid extent."""
    return [
        Extent(offset_bytes=offset, length_bytes=length, kind=ChangeKind(kind))
        for offset, length, kind in zip(
            table["offset"].tolist(), table["length"].tolist(), table["kind"].tolist(), strict=True
        )
    ]


def check_extent_table(table: ExtentTable, *, raw_bytes: int, disk_size_bytes: int | None = None) -> None:
    """The rules that every extent table obeys, whoever sent it; vectorised, a few microseconds.

    Raises InvalidValue unless: there are at most FRAME_EXTENTS_MAX rows; every length is 1..EXTENT_LENGTH_BYTES_MAX;
    every kind is a ChangeKind; reserved is zero; rows are sorted by offset and do not overlap; the last ends within the
    disk (DISK_SIZE_BYTES_MAX if its size is not known here); the DATA lengths add up to raw_bytes.
    """
    if len(table) > FRAME_EXTENTS_MAX:
        raise InvalidValue(what="extent count", value=len(table), rule=f"must be at most {FRAME_EXTENTS_MAX}")
    check_range(raw_bytes, "raw_bytes", low=0, high=FRAME_RAW_BYTES_MAX)
    kinds = table["kind"]
    lengths = table["length"].astype(numpy.uint64)
    data_bytes = int(lengths[kinds == ChangeKind.DATA].sum())
    if data_bytes != raw_bytes:
        raise InvalidValue(what="raw_bytes", value=raw_bytes, rule=f"must equal the data extents' sum {data_bytes}")
    if not len(table):
        return
    if int(kinds.max()) > max(ChangeKind) or table["reserved"].any():
        raise InvalidValue(what="extent kind", value=int(kinds.max()), rule="must be a known kind, reserved bytes zero")
    if int(lengths.min()) < 1 or int(lengths.max()) > EXTENT_LENGTH_BYTES_MAX:
        raise InvalidValue(
            what="extent length", value=int(lengths.min()), rule=f"must be 1 to {EXTENT_LENGTH_BYTES_MAX}"
        )
    offsets = table["offset"]
    limit = DISK_SIZE_BYTES_MAX if disk_size_bytes is None else disk_size_bytes
    if int(offsets.max()) > limit or int((offsets + lengths).max()) > limit:
        raise InvalidValue(what="extent", value=int(offsets.max()), rule=f"must end within the disk's {limit} bytes")
    if len(table) > 1 and bool((offsets[1:] < offsets[:-1] + lengths[:-1]).any()):
        raise InvalidValue(what="extents", value="overlap", rule="must be sorted by offset and must not overlap")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bookmark:
    """A mark at the end of a change set that names a recovery point.

    instant_ns is the last tick of the configuration server's clock that the agent had received before it marked.
    """

    point: PointId
    instant_ns: int

    def __post_init__(self) -> None:
        check_identifier(self.point, "point")
        check_range(self.instant_ns, "instant_ns", low=0, high=2**63 - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangeSetEnd:
    """What the last frame of a change set states about the position that it completes.

    copy_in_cursor_bytes: all of [0, cursor) has been copied in by the running copy-in; None when none runs. A welcome
    gives back the newest durable one. bookmark only with a settled consistency: an unsettled image never gets a point.
    """

    consistency: Consistency
    copy_in_cursor_bytes: int | None = None
    bookmark: Bookmark | None = None

    def __post_init__(self) -> None:
        if self.copy_in_cursor_bytes is not None:
            check_range(self.copy_in_cursor_bytes, "copy_in_cursor_bytes", low=0, high=DISK_SIZE_BYTES_MAX)
            if self.consistency.is_settled:
                raise InvalidValue(
                    what="consistency", value=self.consistency.value, rule="is unsettled while a copy-in is pending"
                )
        if self.bookmark is not None and not self.consistency.is_settled:
            raise InvalidValue(what="bookmark", value=self.bookmark.point, rule="needs a settled position")


class Role(enum.Enum):
    """Who a certificate speaks for; part of its URI name `farpoint://<vault>/<role>/<id>`."""

    AGENT = "agent"
    PROCESS_SERVER = "process-server"
    RECOVERY_WORKER = "recovery-worker"
    CONFIGURATION_SERVER = "configuration-server"


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerIdentity:
    """Who the other side is, taken from its verified certificate and from nothing else."""

    vault: VaultId
    role: Role
    identifier: str

    def __post_init__(self) -> None:
        check_identifier(self.vault, "vault")
        check_identifier(self.identifier, "identifier")

    @property
    def uri(self) -> str:
        return f"farpoint://{self.vault}/{self.role.value}/{self.identifier}"

    @staticmethod
    def from_uri(uri: str) -> PeerIdentity:
        """Raises InvalidValue for anything but a canonical identity URI."""
        scheme, _, rest = uri.partition("://")
        parts = rest.split("/")
        if scheme != "farpoint" or len(parts) != 3 or parts[1] not in {role.value for role in Role}:
            raise InvalidValue(what="identity", value=uri, rule="must be farpoint://<vault>/<role>/<id>")
        return PeerIdentity(vault=VaultId(parts[0]), role=Role(parts[1]), identifier=parts[2])
